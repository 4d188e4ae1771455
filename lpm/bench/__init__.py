"""Reference workloads and what they cost on this machine: `lpm bench`."""
