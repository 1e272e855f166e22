"""Programs that help to develop the project and are no part of the product."""
