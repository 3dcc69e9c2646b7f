"""Jobs: a file of requests is answered by a model, and the answers are written to a file.

A request takes these forms on its way:

1. `Line` (lines.py): the bytes of a line, its number and its digest.
2. `JobRequest` (forms.py makes it with the parsers of api/): the line's number, digest, id and form, its prompt and parameters, or the
   error that it ends in.
3. `TokenRequest` (reading.py has the model make it): one for each answer that the line asks for, token ids and resolved parameters.
4. `TokenResult`: the engine's answer to one of them.  Until it is finished, the engine reports after each pass the tokens generated so far;
   saved_progress.py stores them, so that a later run goes on from there.
5. `CompletionOutput` (serving.py has the model make it): the answer with its text.

serving.py writes the answers as the line's record, a JSON object of its form, whose bytes become durable in the database (store.py).
The output file is made from the records (export.py).  A job knows its model only by the protocol in model.py.

Every line is read and tokenised twice, by the scan and by the run, and under --strict once more before them.  The scan comes first because
the plan depends on the lengths of all requests.  Its token ids are not kept, because nothing bounds them: the ids of a million prompts
take more memory than the input, and writing and reading a file of them takes more time than tokenising, which is little beside the
model's passes.
"""
