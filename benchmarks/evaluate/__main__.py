"""scripts/bench evaluate."""

from gllm_benchmarks.evaluate import main

if __name__ == "__main__":
    main()
