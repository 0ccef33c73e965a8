"""Speed: of one layer (`layers`) and of whole models (`measure`), dense and compressed, in one run."""
