"""What this package settles with the libraries it uses: work-arounds, and warnings that nobody can act on."""
