"""`xllm service`: one OpenAI endpoint over many instances.  Imports neither torch nor vLLM.

The way of one request: `client.py` (bytes to a request; `known_head.py`: one like the last;
`held_bodies.py`: the memory of large ones) ->
`exchange.py` (one request on its way: choose, send, retry, relay; `body.py`: what its body says;
`retry_budget.py`: how much may be sent again; `hedging.py`: what is asked of two at once) ->
`router.py`, `policies.py`, `cost.py` and `cost_choice.py` (which instance; `decision.py` and
`cost_reason.py`: and why; of many: `roster.py`, `ranking.py`, `cost_ranking.py`) -> `upstream.py`
(one connection to an instance, and the pool; `chunks.py`: one event by itself) ->
`continuation.py` (what the client has of a stream, for another instance to go on;
`stream_events.py`: how it comes; `scale_out/`: at a server without this plugin).  Where they are
set, `keys.py` (who asks, and how much;
`key_file.py`) and `flow/` (who is next when not all fit) come before the router.  Beside it:
`lifecycle.py` and `fleet.py` (which instances there are, in what state), `speed.py` (how fast they
are), `kv_index/` (which prefixes they hold), `registry.py`, `etcd_registry.py` and `probes.py` (who
says so), `telemetry.py`, `measured.py` and `stats.py` (what was measured), `admin.py`,
`metrics.py`, `dashboard/`, `access_log.py` and `tracing.py` (see and steer), `tls.py` (HTTPS),
`answers.py` (what all that ask instances share), `process.py` (logs and loop), `carrier.py` (what
carries traffic), `app.py` (starts, reloads and drains all of it), `processes/` (the same with
several processes).
"""
