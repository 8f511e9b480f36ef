"""Files of every released version, which open for ever or are refused by their version."""
