"""The policy: prompts and answers, loading of model, processor and adapter, the tiny Qwen2.5-VL and its cold start."""
