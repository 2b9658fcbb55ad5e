"""The page at `/dashboard` on the admin port.

`overview.py` has what it shows, `pages.py` serves it.  `static/` is the page itself, shipped as it
is: no build step, and nothing is loaded from elsewhere.
"""
