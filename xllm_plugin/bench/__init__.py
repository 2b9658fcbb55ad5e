"""What every benchmark shares: a result schema, a table renderer, a way to run a peer server."""
