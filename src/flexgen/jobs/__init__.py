"""A file of requests in, a file of answers out.

The way of a request, and the forms that it takes:

1. `Line` (lines.py): the bytes of a line, its number and its digest.
2. `JobRequest` (forms.py reads it; api/ knows how): the line with its id and form, and what it asks for, or the error that it ends in.
3. `TokenRequest` (reading.py has the model make it): one for each answer that the line asks for, token ids and resolved parameters.
4. `TokenResult`: the engine's answer to one of them.  Until then it is the engine's, which reports after each pass how far answers have
   come; saved_progress.py stores that, so that a later run goes on from there.
5. `CompletionOutput` (serving.py has the model make it): the answer with its text.
6. The record, a JSON object of the line's form; its bytes become durable in a `ResultRow` of the database (store.py).

The output file is made from the records (export.py).  A job knows its model only by the protocol in model.py.

Every line is read and tokenised twice, by the scan and by the run, and under --strict once more before them.  The plan depends on the
lengths of all requests, and what would have to be kept instead of reading them again has no bound: the ids of a million prompts take
more memory than the input, and as a file more time than tokenising takes beside the model's passes.
"""
