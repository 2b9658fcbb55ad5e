"""`xllm service`: one OpenAI endpoint over many instances.  Imports neither torch nor vLLM.

The way of one request: `client.py` (bytes to a request) -> `exchange.py` (one request on its way:
choose, send, retry, relay) -> `router.py` and `policies.py` (which instance) -> `upstream.py` (one
connection to an instance, and the pool) -> `continuation.py` (what the client has of a stream, for
another instance to go on).  Beside it: `lifecycle.py` and `fleet.py` (which instances there are, in
what state), `speed.py` (how fast they are), `kv_index/` (which prefixes they hold), `registry.py`,
`etcd_registry.py` and `probes.py` (who says so), `admin.py` and `metrics.py` (see and steer),
`app.py` (starts, reloads and drains all of it).
"""
