"""What `make release-check` runs: one script for each property of the files that a release uploads."""
