"""People: the struct of arrays a shard holds, and their synthesis from public margins."""
