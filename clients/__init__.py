"""What an institution runs: its process, its people and series, its streams to the coordinator."""

from lpm.protocol.wire import require_tls_1_3

# Before anything here can load gRPC, which reads the setting once and for the whole process.
require_tls_1_3()
