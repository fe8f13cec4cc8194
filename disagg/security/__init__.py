"""Who may talk to whom: CURVE keys, one-time join tokens, registrations, and the private files that hold them."""
