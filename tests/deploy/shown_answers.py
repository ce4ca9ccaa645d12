"""What a model that sees answers to `deploy.demo.QUESTIONS` about `deploy.demo.PICTURE`, in their order."""

SHOWN_ANSWERS = ("CAFE TESSERA", "2.80", "7")
