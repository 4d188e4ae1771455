"""How a federation comes together and goes on: identities, the signed manifest, messages, and the session's states.

Everything here is a pure state machine or a data type: messages in, messages out, no sockets and no threads.
"""
