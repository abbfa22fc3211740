"""One folder per format: reading, writing, running. Each imports only its own framework."""
