"""Which instance holds which prefix in its KV cache, exactly: from the events that vLLM publishes.

The way of one event: `wire.py` (bytes to an event) -> `subscriber.py` (in order, nothing missing)
-> `index.py` (who holds what).  The way of one request: `tokens.py` (its prompt's token ids, as the
instance will see them; `prompts.py`: those of the last requests) -> `index.py` (how much of it each
instance has).  `directory.py` owns all of it and follows the fleet.  Token ids are found here
(`local.py`: copies of the instances' tokenizers and chat templates, held against them by
`samples.py`; `chats.py` and `templates.py`: chats to text) or asked for (`asking.py`).
"""
