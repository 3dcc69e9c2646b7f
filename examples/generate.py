"""Continue a few prompts from Python: python examples/generate.py [MODEL]"""

from __future__ import annotations

import sys

from flexgen import LLM, SamplingParams

PROMPTS = ["The old house stood upon the hill,", '"My dear sir," said the doctor,', "I was born in the year of the great frost, and"]


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "models/novels-opt-7m"
    greedy = SamplingParams(temperature=0, max_tokens=32)
    varied = SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_tokens=32)
    # Half of the weights stay in memory, half are read from disk in every pass; the process keeps within the budget.
    with LLM(model, host_mem="2GiB", weights="host=.5,disk=.5") as llm:
        for params in (greedy, varied):
            for output in llm.generate(PROMPTS, params):
                print(f"{output.prompt} |{output.outputs[0].text}\n")


if __name__ == "__main__":
    main()
