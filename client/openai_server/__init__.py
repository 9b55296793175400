"""An OpenAI-compatible HTTP server in front of tritonserver: `gllm openai`.

    client --HTTP--> gate.py --> chat.py, completions.py ... --> generation.py --gRPC--> Triton
                                     ^                                |
                                     +--- events.py <-- formats/ <----+  (text becomes events)

Knows Triton's tensors through gllm_client alone, and nothing of the engine.
"""
