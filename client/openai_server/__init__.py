"""An OpenAI-compatible HTTP server in front of tritonserver: `gllm openai`.

    client --HTTP--> app.py --> chat.py, completions.py, ... --> generation.py --gRPC--> tritonserver
                                     ^                                |
                                     +--- events.py <-- formats/ <----+  (text becomes events)

Knows Triton's tensors through gllm_client alone, and nothing of the engine.
"""
