"""Flow control: which request is sent when not all can be.

`queue.py` decides who is next and who has to leave, `bucket.py` what a rate allows; both are pure.
`wishes.py` reads what a request was promised, `usage.py` what it has used.  `control.py` holds
requests while no instance has room, `stats.py` has what became of them,
`metrics.py` shows all of it.
"""
