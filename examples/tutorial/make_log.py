"""Write the log of a web server that fails now and then."""

with open("access.log", "w", encoding="utf-8") as log:
    for number in range(1, 301):
        print(f"GET /item/{number} {500 if number % 50 == 0 else 200}", file=log)
