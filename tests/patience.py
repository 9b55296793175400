"""How long tests wait: limits that only a broken product reaches, however busy the machine is."""

from __future__ import annotations

# For what must happen at all, such as the start of an engine, which imports torch.
WAIT_S = 180.0
# For what takes a second or two where processors are free. Without the mechanism under test it
# would come after a timeout of 30 s at least, or never.
SOON_S = 15.0
SCRIPT_S = 280.0  # for a test's own process to end; a whole test may take 300 s
