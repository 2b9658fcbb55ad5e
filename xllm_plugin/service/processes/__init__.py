"""Several processes for one service: `service.processes` workers carry traffic, one controls them.

::

    control   registries, probes, states, fitted speeds, keys' file, admin port, metrics, dashboard
       |  channel (`channel.py`): who is there, settings, keys  -->
       |                          <--  what was met and measured, four times a second
    worker 0 .. N-1   the public port (SO_REUSEPORT), router, streams, queue, KV index
       |
    shared memory (`shared.py`): requests and tokens under way, by instance and by key

`control.py` is the service without traffic, `supervisor.py` keeps its workers running, `worker.py`
is one of them, `worker_proxy.py` its port.  `mirror.py` is the fleet as a worker sees it, `news.py`
what the control process sends it of the fleet; `limits.py` are the keys' limits over all workers.
`messages.py` has what is said, `reports.py` what workers say of their traffic and how it is added
up.

Nothing here is imported by a service of one process.
"""
