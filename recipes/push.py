from hpt_hf.commands.push import main

if __name__ == "__main__":
    main()
