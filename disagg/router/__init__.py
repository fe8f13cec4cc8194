"""The data path: the public listener, the connections to engines and the relay between them."""
