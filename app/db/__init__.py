"""All SQL of the product, one file per noun. It knows rows; what is allowed is the business of app.core."""
