"""What chapters 02 to 08 derive, one module for each technique, and the network that all of them parallelise."""
