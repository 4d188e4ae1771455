"""What the coordinator runs: it gathers the parties, passes sealed messages on, and steps the posterior."""

from lpm.protocol.wire import require_tls_1_3

# Before anything here can load gRPC, which reads the setting once and for the whole process.
require_tls_1_3()
