"""A job's configuration files, read and checked before anything else."""
