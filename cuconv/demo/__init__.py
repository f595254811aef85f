"""`cuconv demo`: a Conv1D network learns shoulder exercises from the sensors of a smartwatch."""
