"""Read a job's configuration files and check them before anything else happens."""
