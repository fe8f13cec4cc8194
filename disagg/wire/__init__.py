"""What hosts and routers say to each other: messages, and how they become bytes."""
