"""The rig: fake engines, load, peers and tables of the router benchmark, and the test that they tell the truth."""
