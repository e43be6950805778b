"""vLLM as the engine: a triple as one model of an unmodified vLLM; docs/vllm.md.

settings.py    what a configuration says about the engine
checks.py      everything that is refused before a model is loaded
plan.py        the members of one system as vLLM loads them: widths, positions, dtype
plugin.py      what vLLM calls in each of its processes
model.py       base, expert and antiexpert as one model
roles.py       a prompt and an alpha per request (model runner V2)
sampling.py    our sampler as a logits processor
requests.py    our requests as vLLM's, and its log-probabilities as ours
engine.py      one vLLM engine, and who waits for its outputs
loop.py        a decode loop whose tokens vLLM chooses
generator.py   a `Generator` on an engine
pool.py        the systems of an experiment, one engine after the other
merging.py     an adapter merged into its checkpoint
command.py     the line that starts a plain vLLM server of a triple

Nothing else in proxytune imports vllm, and of this package no module but settings is imported
where another engine is chosen. vLLM pins transformers and torch, so it has an environment of its
own.
"""
