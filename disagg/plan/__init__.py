"""What a cluster would do with a recorded load: traces, engines in virtual time, and the live policies between them."""
