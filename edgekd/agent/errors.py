"""What the agent says when it cannot go on."""

from __future__ import annotations


class AgentError(Exception):
    """Something the person who asked can act on: printed without a traceback."""
