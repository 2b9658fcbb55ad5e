"""A fleet without servers: the service's own routing code before simulated engines, in their time.

`profile` (how long a step takes) -> `engine` (one instance) -> `simulation` (arrivals, the service,
delays) -> `summary` (figures).  `workload` reads traces, `promises` gives requests some of their
own, `cache_aware` is a peer's policy.
"""
