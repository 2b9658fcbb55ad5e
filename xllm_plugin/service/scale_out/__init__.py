"""Streams that go on at a server without this plugin: vLLM's `--enable-scale-out` routes.

Three calls make of a prompt and its tokens what the rest of a stream is: `/render` (which tokens
the prompt has, and how it is sampled), `/inference/v1/generate` (the tokens after those that the
client has) and `/derender` (their text).  `resumer.py` takes what `POST /v1/xllm/resume` would be
sent and answers as it would; `continuation.py` is one such stream, `server.py` asks the server,
`text.py` for the text of tokens, `events.py` writes the client's events, `rule.py` says which
streams can go on so, `messages.py` has the forms.
"""
