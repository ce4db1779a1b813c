"""Files of bit planes for a runtime of one's own."""
