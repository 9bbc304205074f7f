"""An HTTP server over embedded engines: OpenAI's API, SGLang's endpoints for RL, and vLLM's token ids."""
