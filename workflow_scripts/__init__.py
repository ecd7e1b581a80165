"""softpref: visual preference reasoning with soft rewards, one module per stage of the workflow."""
