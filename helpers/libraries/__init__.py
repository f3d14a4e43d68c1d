"""Work around defaults of the libraries, and silence warnings nobody here can act on."""
