"""What a device family must provide: small protocols, a capability record, discovery.

Nothing here names a vendor.  A family is a folder beside this one with an `accelerator.py`.
"""

from __future__ import annotations
