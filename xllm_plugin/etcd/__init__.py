"""etcd v3, as both sides use it: servers put themselves there, services watch.

`config` says where it is, `wire` what is said to it, `client` says it, `records` what lies there,
`view` what is known of it.

It is etcd's JSON beside its gRPC (the "gRPC gateway", on in every etcd since 3.4) over httpx, which
is here anyway: a handful of calls.  The libraries were looked at and not taken: etcd3 was last
released in 2020; aetcd brings grpcio and protobuf into servers whose engine begins as a fork, which
gRPC's threads are not made for; etcd3gw has no asyncio.
"""
