"""Model families: the hosts that reduction methods plug into, and the names of the zoo."""
