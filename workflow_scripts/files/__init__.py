"""Files and what is recorded of them: digests, atomic writing, redaction of secrets."""
