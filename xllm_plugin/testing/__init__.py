"""The test kit that ships: checks and fakes for this package's tests, benchmarks and third parties.

Nothing here is imported by the running system.
"""

from __future__ import annotations
