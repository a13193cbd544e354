"""Ranks as processes, the mailbox between host and kernel, and the engine that keeps requests in it.

Read in this order: mailbox (the two rings), engine (requests), group (the ranks' processes), worker (one of those processes).
"""
