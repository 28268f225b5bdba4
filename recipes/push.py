from hpt_hf.push import main

if __name__ == "__main__":
    main()
