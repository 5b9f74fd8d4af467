"""Python reads this as a process begins: without torch, which no user has, and which takes seconds to import."""

import sys

sys.modules["torch"] = None
