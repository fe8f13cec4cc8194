"""A small real engine on the CPU, in NumPy: for first contact, tests and chaos. It speaks SGLang's surface."""
